"""Tests of the example agents: their pure logic, and the agents on a recorded run."""
