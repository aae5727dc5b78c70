"""What executes encode and step."""
