"""What features exist and how they are read: definitions, ingest, sequences, the one reader."""
