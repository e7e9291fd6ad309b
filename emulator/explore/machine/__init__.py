"""The machine under the scheduler: the library that explored code calls, its footprints, and programs."""
