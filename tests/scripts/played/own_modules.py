"""Hook points in modules of one's own, as the page on hooks shows them."""

import torch
from torch import nn
from transformer_lens.hook_points import HookedRootModule, HookPoint

results = {}


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.hook_square = HookPoint()

    def forward(self, value):
        return self.hook_square(value * value)


class Three(HookedRootModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = Square(), Square()
        self.hook_in, self.hook_mid, self.hook_out = HookPoint(), HookPoint(), HookPoint()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.arange(9).reshape(3, 3) / 7)
            self.linear.bias.fill_(0.5)
        self.setup()

    def forward(self, value):
        value = self.hook_in(value)
        value = self.hook_mid(self.first(value)) - 3
        return self.hook_out(self.linear(self.second(value)))


model = Three()
x = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
results["names"] = list(model.hook_dict)
output, cache = model.run_with_cache(x)
results["output"] = output
results["cached"] = sorted(cache)
results["squares"] = [cache["first.hook_square"], cache["second.hook_square"]]


def zero_first(value, hook):
    value = value.clone()
    value[0] = 10
    return value


results["hooked"] = model.run_with_hooks(x, fwd_hooks=[("hook_mid", zero_first)])
results["again"] = model(x)
results["two"] = model.run_with_hooks(
    x, fwd_hooks=[(lambda name: name.endswith("square"), lambda value, hook: value + 1), ("hook_out", zero_first)]
)
gradients = {}
model.add_hook("hook_mid", lambda value, hook: gradients.update(mid=value.clone()), dir="bwd")
model(x).sum().backward()
results["gradient"] = gradients["mid"]
results["weight gradient"] = model.linear.weight.grad
model.zero_grad()
model.reset_hooks()
model.add_perma_hook("hook_in", lambda value, hook: value * 2)
results["permanent"] = model(x)
model.reset_hooks()
results["still"] = model(x)
model.reset_hooks(including_permanent=True)
results["gone"] = model(x)
fwd, bwd, filled = {}, {}, None
filled, forward_hooks, backward_hooks = model.get_caching_hooks(["hook_mid", "hook_out"], incl_bwd=True)
with model.hooks(forward_hooks, backward_hooks):
    model(x).sum().backward()
results["by caching hooks"] = [sorted(filled), filled["hook_mid"], filled["hook_mid_grad"]]
cached = model.add_caching_hooks("hook_out")
model(x)
results["added"] = cached["hook_out"]
model.reset_hooks()
point = HookPoint()
point.add_hook(lambda value, hook: value + 1)
results["a point alone"] = point(torch.zeros(2))
point.remove_hooks("fwd")
results["a point without hooks"] = point(torch.zeros(2))
