"""Visual prompt tuning of frozen vision backbones."""
