"""Commands that stand on the scripts: python -m extras.NAME"""
