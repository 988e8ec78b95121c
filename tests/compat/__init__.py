"""Files, calls, trainers and programs as they are in the world: equal to what they were written for, or refused by name."""
