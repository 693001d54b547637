"""Which ingredient does each architecture need to learn retrieval of a position at all?"""
