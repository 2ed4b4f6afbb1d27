"""Replicas and their lives: started, watched, rebuilt, stopped, and published to front ends."""
