"""Where an adapter comes from: its base's fingerprint, its lineage, its model card."""
