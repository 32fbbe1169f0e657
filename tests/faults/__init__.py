"""The fault campaign: commands are killed, starved of disk and fed damaged files; none may end at a wrong result."""
