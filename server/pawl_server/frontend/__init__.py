"""The process that clients talk to: validates, admits, routes, turns tokens into text. Imports nothing."""
