"""The work that a bank does in the background: erase, expire, clean, verify, repair, recode and upgrade."""
