"""What every process needs and no torch: settings, messages, problems, pictures, the catalogue."""

__version__ = "0.1.0"
