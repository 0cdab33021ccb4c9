"""Define what the supervisor and the hosts send to each other."""
