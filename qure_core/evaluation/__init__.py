"""Evaluation: pure metrics, the protocols, and the stage that ranks a corpus on Ray."""
