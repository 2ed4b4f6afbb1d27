"""What front end, engine and fleet say to each other."""
