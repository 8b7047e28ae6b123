"""Process groups: a rank's part of the classes, ranks that fail, and launches."""
