"""The thin library: tasks and people in, sweeps, records and statistics out."""
