"""Preference data: where it comes from, how it is split and stored, how it reaches the mesh.

A source (`reviews`, `files`) makes three tables - conversations to imitate, pairs to compare,
prompts to answer - each with a training and a held-out side (`records`). Its TFDS builder stores
them as array_record files (`prepare`), and `batches` turns those into padded NumPy batches.
"""
