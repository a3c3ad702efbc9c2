"""What the experts that are diffusers pipelines share; a family itself is one file of ddil_env.experts.

find.py             finds a pipeline's folder: a path, the hub's cache or the hub
supported_config.py the entries of configurations that are supported; any other raises an error
folder.py           checks and reads a pipeline's files, without running any code of theirs
samplers.py         reads a scheduler as a NoiseSchedule, and makes the scheduler that samples as this library does
prompts.py          texts, and the tables of their embeddings
data.py             the settings of the user's data, which become a cache of latents and embeddings
networks.py         a pipeline's network as a function of condition ids
expert.py           the expert: its network, its data, its students
latent_expert.py    … of a pipeline with a VAE
prompted_expert.py  … of a pipeline that reads texts
student_folder.py   writes a student as a pipeline, and reads it back
model_card.py       the README.md of a saved student
"""
