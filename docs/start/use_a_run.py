import torch

from ddil_agents import load

agent = load("runs/dagger")
env = agent.make_env([16])  # TorchRL; as many worlds as environments
env.set_seed(0)
trajectory = env.rollout(200, agent.student_policy)  # until the first episode ends
print(f"{trajectory.shape[1]} actions, of {agent.config.num_steps} a sample")

place = torch.tensor([0.0, 1.0])  # straight ahead of a peg
directions = agent.sample(500, c=place)  # (500, 2)
print(f"{float((directions[:, 0] > 0).float().mean()):.0%} go right")
