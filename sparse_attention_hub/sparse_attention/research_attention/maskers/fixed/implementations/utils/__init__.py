"""What single maskers compute with, apart from selecting."""
