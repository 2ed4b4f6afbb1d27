"""Discrete-event simulator around the production scheduler: virtual time, no model, no I/O but its reports."""
