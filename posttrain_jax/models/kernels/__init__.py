"""What a backend needs and the mathematics does not."""
