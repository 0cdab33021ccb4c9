"""What happens inside one process."""
