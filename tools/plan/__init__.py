"""What a recipe would do on machines that nobody has rented yet; the model and its checks: README.md here."""
