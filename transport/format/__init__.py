"""Write tensors as bytes, and read them back."""
