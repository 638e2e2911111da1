"""Does a bank grow, slow down or lose anything under mixed load that goes on?"""
