"""Why a translation was used that KVM had promised away: the race as a diagram, like those of changelogs."""
