"""The work that a bank does of itself: compact, erase, expire, verify, repair, recode."""
