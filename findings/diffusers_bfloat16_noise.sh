#!/usr/bin/env bash
# In bfloat16, diffusers adds no noise at the first two timesteps, and its 1000 noise levels are far fewer.
#
# Guess, written before the first run: add_noise of bfloat16 latents is the float32 result rounded to bfloat16; at
#   timestep 0 the noise is small (0.03 of Stable Diffusion's schedule) but there, for bfloat16 resolves 0.03.
# Versions: diffusers 0.42.1, torch 2.13.0, numpy 2.3.5, Python 3.11.
# Behaviour: the cumulative product of alphas is cast to the latents' dtype before 1 minus it is taken. Near 1 bfloat16
#   steps by 0.004, so at timesteps 0 and 1 the factor of the noise is exactly 0: add_noise returns its input, while
#   the training target is still the full noise, which nothing can predict. get_velocity there is the noise itself.
#   Timesteps 2, 3 and 4 share one factor; of 1000 factors 192 are distinct. Latents cast to
#   float32 before the call avoid it.
# Output seen:
#   timestep 0: standard deviation of the added part float32 0.0291, bfloat16 0.0000
#   timestep 1: standard deviation of the added part float32 0.0412, bfloat16 0.0000
#   timestep 2: standard deviation of the added part float32 0.0505, bfloat16 0.0627
#   distinct noise factors of 1000: float32 1000, bfloat16 192
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 numpy==2.3.5
"$dir/env/bin/python" - <<'PY'
import torch
from diffusers import DDPMScheduler

scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
torch.manual_seed(0)
latents, noise = torch.randn(2, 1, 4, 64, 64)
added = {}
for step in (0, 1, 2):
    for dtype in (torch.float32, torch.bfloat16):
        clean = latents.to(dtype)
        noisy = scheduler.add_noise(clean, noise.to(dtype), torch.tensor([step]))
        added[step, dtype] = float((noisy.float() - clean.float()).std())
    pair = added[step, torch.float32], added[step, torch.bfloat16]
    print(f"timestep {step}: standard deviation of the added part float32 {pair[0]:.4f}, bfloat16 {pair[1]:.4f}")
assert all(added[step, torch.float32] > 0.028 for step in (0, 1, 2))
assert added[0, torch.bfloat16] == added[1, torch.bfloat16] == 0 < added[2, torch.bfloat16]
target = scheduler.get_velocity(latents.bfloat16(), noise.bfloat16(), torch.tensor([0]))
assert torch.equal(target, noise.bfloat16())

zeros, ones = torch.zeros(1000, 1), torch.ones(1000, 1)
steps = torch.arange(1000)
count = {
    dtype: len(scheduler.add_noise(zeros.to(dtype), ones.to(dtype), steps).unique())
    for dtype in (torch.float32, torch.bfloat16)
}
print(f"distinct noise factors of 1000: float32 {count[torch.float32]}, bfloat16 {count[torch.bfloat16]}")
assert count[torch.float32] == 1000
assert count[torch.bfloat16] < 250
PY
