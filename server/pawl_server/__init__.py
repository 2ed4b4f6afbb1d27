"""pawl server: front end, engine, scheduler, paged KV cache and fleet."""
