"""The relative table spread out to a bias, and its gradient gathered in again, in Triton."""
