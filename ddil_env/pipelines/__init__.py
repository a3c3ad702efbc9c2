"""What the experts that are diffusers pipelines share; a family itself is one file of ddil_env.experts.

folder.py    a pipeline's files: found, checked, and read without ever running code of theirs
samplers.py  a scheduler's noise as a NoiseSchedule, and the scheduler that samples as this library does
prompts.py   texts, and the table of their embeddings
data.py      the user's pictures, turned into a cache of latents and embeddings
networks.py  a pipeline's network as a function of condition ids
expert.py    the expert on top: pictures, students, and students written as pipelines
"""
