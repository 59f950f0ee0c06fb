"""What is on disk or on the Hub: headers, names, storage types, lineage."""
