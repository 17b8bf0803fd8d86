"""Objectives: from the outputs of a step to losses per sample."""
