"""The same method for a diffusion transformer: python -m pictures.pictures"""
