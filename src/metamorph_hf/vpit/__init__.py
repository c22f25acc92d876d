"""Visual-Predictive Instruction Tuning (VPiT): configuration, trainer, collator and callbacks."""
