"""Between front ends and an engine: `client` for front ends, `server` for engines. Imports nothing."""
