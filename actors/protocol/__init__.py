"""What the supervisor and the hosts say to each other."""
