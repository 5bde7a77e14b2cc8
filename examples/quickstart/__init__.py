"""The quickstart: toy world, three training stages, judged images and a page, step by step.

Standard library only, so that it also explains what is missing when the installation failed.
"""
