"""One view of all: every method as a change to a hidden state, and one more made by mixing."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn

from ..engine import DESIGNS, Injection, Method, PeftFiles, inject, injection_of, registered_methods
from .adalora import AdaLoRA
from .adapters import BottleneckAdapter
from .dora import DoRA
from .ia3 import IA3
from .lora import LoRA
from .prefix import Prefix, flat_prefix
from .prompt import Prompt
from .qlora import QLoRA
from .selective import BitFit, DiffPruning, PartialFineTuning, SparseTuning


@dataclass(frozen=True)
class Site:
    """Record one module of a model after a forward pass: its input x, the hidden state h that the
    same x gives without the method, and the one with the method, `new`, of the shape of h.
    `more` holds further tensors of a formula by name."""

    path: str
    module: nn.Module
    x: torch.Tensor
    h: torch.Tensor
    new: torch.Tensor
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def calls_of(model: nn.Module, batch: Mapping, modules: Mapping[str, nn.Module]) -> list[tuple]:
    """Return (path, module, arguments, output) for each call of `modules`, {path: module}, in a
    forward pass of the batch, in the order in which the calls return."""
    calls, hooks = [], []
    for path, module in modules.items():
        hooks.append(
            module.register_forward_hook(
                lambda module, args, output, path=path: calls.append((path, module, args, output))
            )
        )
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@torch.no_grad()
def linears(model: nn.Module, batch: Mapping) -> list[Site]:
    """Return a Site for each wrapped layer with added parameters; h (..., out) is the output of the
    layer inside."""
    added = {
        path: layer
        for path, layer in injection_of(model).wrappers.items()
        if any(not name.startswith("base.") for name, _ in layer.named_parameters())
    }
    return [
        Site(path, layer, args[0], layer.base(*args), new)
        for path, layer, args, new in calls_of(model, batch, added)
    ]


def gap(sites: list[Site], delta: Callable[[Site], torch.Tensor]) -> float:
    """Return max|new − h − Δh| / max|new − h| over all sites, infinite if new = h everywhere."""
    ran = [site.new - site.h for site in sites]  # (..., d) each
    size = max(change.abs().max().item() for change in ran)
    off = max(
        (change - delta(site)).abs().max().item() for change, site in zip(ran, sites, strict=True)
    )
    return off / size if size else float("inf")


def low_rank(site: Site) -> torch.Tensor:
    """Return s · x Aᵀ Bᵀ (LoRA)."""
    lora = site.module.lora
    return lora.scaling * (site.x @ lora.lora_A.T @ lora.lora_B.T)  # (..., out)


def heads(t: torch.Tensor, d_h: int) -> torch.Tensor:
    """Split (batch, T, n · d_h) into heads (batch, n, T, d_h)."""
    return t.unflatten(-1, (-1, d_h)).transpose(1, 2)


def attention_scores(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return q kᵀ / √d_h (batch, n_h, T, S), −∞ for keys that the mask (batch, S) excludes."""
    s = q @ k.mT / q.shape[-1] ** 0.5  # (batch, n_h, T, S)
    return s if mask is None else s.masked_fill(~mask[:, None, None].bool(), -torch.inf)


def gated(site: Site) -> torch.Tensor:
    """Return λ (softmax(q P_kᵀ / √d_h) P_v − h), (batch, T, d) (He et al. 2022, section 3.1)."""
    layer, d_h = site.module, site.module.attention_head_size
    q, k = heads(layer.query(site.x), d_h), heads(layer.key(site.x), d_h)  # (batch, n_h, T, d_h)
    to_prefix = attention_scores(q, site.more["keys"])  # (batch, n_h, T, p)
    to_text = attention_scores(q, k, site.more["mask"])  # (batch, n_h, T, T)
    gate = torch.sigmoid(to_prefix.logsumexp(-1) - to_text.logsumexp(-1))  # (batch, n_h, T)
    u = to_prefix.softmax(-1) @ site.more["values"]  # (batch, n_h, T, d_h)
    return (gate[..., None] * (u - heads(site.h, d_h))).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Design:
    """Describe a method as h -> h + Δh by the four choices of He et al. 2022, section 4: functional
    form, insertion form (sequential: reads h, parallel: reads x), modified representation and
    composition function.

    `delta` computes Δh from a Site, scale and gate included. `sites` runs a model and returns its
    sites. `example` fits a BERT; None means the method with all its defaults. `check_design`
    compares `delta` with the running model; nothing checks the words."""

    form: str
    insertion: str
    modified: str
    composition: str
    delta: Callable[[Site], torch.Tensor]
    sites: Callable[[nn.Module, Mapping], list[Site]] = linears
    example: Method | None = None


def designs_of(kind: type[Method]) -> tuple:
    """Return a method's own designs, from its class attribute `design` or from DESIGNS."""
    declared = vars(kind).get("design", DESIGNS.get(kind))
    return declared if isinstance(declared, tuple) else (declared,)


LINEAR, SUM = "output of any linear layer", "h + u"
SCALED = dict(insertion="parallel", modified=LINEAR, composition="h + s · u")
DESIGNS[LoRA] = Design(form="x Aᵀ Bᵀ", **SCALED, delta=low_rank, example=LoRA(rank=8, alpha=16))


@dataclass(frozen=True)
class MixAndMatch(Method):
    """Combine a prefix with scaled parallel adapters (MAM adapter, He et al. 2022, section 4.6)."""

    tokens: int
    width: int
    scale: float = 4.0
    learning_rate = 1e-3
    rate_factors = {"embedding": 10.0}  # the prefix learns ten times as fast
    files = PeftFiles(
        "MIX_AND_MATCH",
        fields={"tokens": ("tokens", None), "width": ("width", None), "scale": ("scale", 4.0)},
        tensors={"embedding": "prompt_embeddings", **BottleneckAdapter.files.tensors},
    )

    @property
    def adapter(self) -> BottleneckAdapter:
        """Return the half that wraps the feed-forward."""
        return BottleneckAdapter(self.width, kind="parallel", activation="relu", scale=self.scale)

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        return self.adapter.find(model)

    def check(self, path: str, layer: nn.Module) -> None:
        self.adapter.check(path, layer)

    def wrap(self, path: str, layer: nn.Module) -> nn.Module:
        return self.adapter.wrap(path, layer)

    def attach(self, model: nn.Module) -> tuple[nn.Module, list]:
        return Prefix(self.tokens).attach(model)


@torch.no_grad()
def ends(model: nn.Module, batch: Mapping) -> list[Site]:
    """Return a Site for each adapter at the end of a BERT's sublayer; h (..., d) is the output of
    the dense layer, `new` replaces h in the sum with the residual x (..., d)."""
    places = injection_of(model).wrappers
    norms = {f"{path}.LayerNorm": place.base.LayerNorm for path, place in places.items()}
    sites, inside = [], None
    for path, module, args, _ in calls_of(model, batch, places | norms):
        if path in norms:
            inside = args[0]  # of the norm's last call: x + new                   (..., d)
        else:
            u, x = args  # (..., d)
            sites.append(Site(path, module, x, module.base.dense(u), inside - x))
    return sites


def only(sites: Callable, rule: Callable[[nn.Module], bool]) -> Callable:
    """Return the function `sites`, restricted to the sites whose module passes `rule`."""
    return lambda model, batch: [s for s in sites(model, batch) if rule(s.module)]


def virtual(prefix: nn.Module, layer: nn.Module, rows: torch.Tensor) -> list | torch.Tensor:
    """Return keys and values (batch, n_h, p, d_h) of the virtual tokens in one attention layer: the
    projections of a prompt's hidden states (batch, p, d), or with p = 0 those of the prefix."""
    if rows.shape[1]:
        return [heads(f(rows), layer.attention_head_size) for f in (layer.key, layer.value)]
    P = flat_prefix(prefix).unflatten(1, prefix.layout)[:, layer.layer_idx]  # (p, 2, n_h, d_h)
    return P.permute(1, 2, 0, 3)[:, None]  # (2, 1, n_h, p, d_h)


@torch.no_grad()
def attention(model: nn.Module, batch: Mapping) -> list[Site]:
    """Return a Site for each self-attention of a BERT; h (batch, T, d) is attention to the text
    alone. x and `new` leave out the positions of a prompt."""
    mask, prefix, sites = batch["attention_mask"], injection_of(model).attached, []
    layers = {
        path: m for path, m in model.named_modules() if type(m).__name__.endswith("SelfAttention")
    }
    for path, layer, (rows, *_), (new, *_) in calls_of(model, batch, layers):
        p = rows.shape[1] - mask.shape[1]
        x, d_h = rows[:, p:], layer.attention_head_size  # (batch, T, d)
        q, k, v = (heads(f(x), d_h) for f in (layer.query, layer.key, layer.value))
        h = attention_scores(q, k, mask).softmax(-1) @ v  # (batch, n_h, T, d_h)
        K, V = virtual(prefix, layer, rows[:, :p])  # (batch, n_h, p, d_h)
        more = {"keys": K, "values": V, "mask": mask}
        sites.append(Site(path, layer, x, h.transpose(1, 2).flatten(2), new[:, p:], more))
    return sites


def of_head(name: str, injection: Injection) -> bool:
    """Return whether a parameter belongs to a module that is trained in full beside the method."""
    return name.startswith(tuple(f"{path}." for path in injection.whole_modules))


def values_before(injection: Injection) -> dict[str, dict[str, torch.Tensor]]:
    """Return {path: {"weight" or "bias": initial values}} of the base's trainable parameters."""
    before = {}
    for name, old in injection.whole.items():
        if not of_head(name, injection):
            path, _, leaf = name.rpartition(".")
            before.setdefault(path, {})[leaf] = old
    return before


def standardised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x̂ (..., d): x with mean 0 and variance 1 over the last dimension."""
    x = x - x.mean(-1, keepdim=True)  # (..., d)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps) ** 0.5  # (..., d)


@torch.no_grad()
def own_layers(model: nn.Module, batch: Mapping) -> list[Site]:
    """Return a Site for each Linear or LayerNorm of the base that is trained; h (..., d) is its
    output with the initial values, `more` their change. For a norm, x is x̂."""
    before, sites = values_before(injection_of(model)), []
    layers = {path: model.get_submodule(path) for path in before}
    for path, layer, (x, *_), new in calls_of(model, batch, layers):
        now = dict(layer.named_parameters())
        change = {f"Δ{leaf}": now[leaf] - old for leaf, old in before[path].items()}
        old = now | before[path]
        if isinstance(layer, nn.LayerNorm):
            x = standardised(x, layer.eps)  # (..., d)
            h = x * old["weight"]  # (..., d)
        else:
            h = x @ old["weight"].T  # (..., out)
        sites.append(Site(path, layer, x, h + old.get("bias", 0), new, change))
    return sites


@torch.no_grad()
def perturbed(model: nn.Module, method: Method) -> nn.Module:
    """Return a float64 copy of the model with the method, its trainable parameters perturbed: with
    the initial values Δh is 0, and a wrong formula could pass."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        changed = copy.deepcopy(model).eval().double()
        inject(changed, method)
        changed.double()
        for p in changed.parameters():
            if p.requires_grad:
                p.mul_(torch.rand_like(p) / 2).add_(0.05 * torch.randn_like(p))
    return changed


CHOICES = ("form", "insertion", "modified", "composition")


def row_of(design: Design, method: Method, model: nn.Module, batch: Mapping) -> dict:
    """Return a row of the table: the design's four choices and, after a forward pass, the number of
    sites, the trainable parameters outside a head, and the `gap`."""
    changed = perturbed(model, method)
    injection, sites = injection_of(changed), design.sites(changed, batch)
    own = [
        p
        for name, p in changed.named_parameters()
        if p.requires_grad and not of_head(name, injection)
    ]
    return {choice: getattr(design, choice) for choice in CHOICES} | {
        "places": len(sites),
        "trainable": sum(p.numel() for p in own),
        "gap": gap(sites, design.delta) if sites else None,
    }


@torch.no_grad()
def check_design(method: Method | type[Method], model: nn.Module, batch: Mapping) -> list[dict]:
    """Check each `Design` of a method against a copy of the model and return one row for each. A
    class is checked by the design's example. Without a design, the one row says so."""
    kind, rows = method if isinstance(method, type) else type(method), []
    for design in designs_of(kind):
        if design is None:
            row = dict.fromkeys(CHOICES, "") | {"form": "says no design"}
            row |= dict.fromkeys(("places", "trainable", "gap"))
        else:
            instance = (design.example or kind()) if kind is method else method
            row = row_of(design, instance, model, batch)
        rows.append({"method": kind.__name__} | row)
    # An instance has the sites of some designs only: an adapter is of one kind.
    return [row for row in rows if row["places"] != 0] or rows[:1]


def unified_table(model: nn.Module, batch: Mapping) -> list[dict]:
    """Return the rows of `check_design` for every method defined so far, of two classes of one name
    those of the last: a lesson defines a method of the package again."""
    kinds = {kind.__name__: kind for kind in registered_methods()}.values()
    return [row for kind in kinds for row in check_design(kind, model, batch)]


def weight_decomposed(site: Site) -> torch.Tensor:
    """Return x (c ⊙ V)ᵀ − x Wᵀ, with V = W + s · BA and c = m / ‖V‖ (DoRA)."""
    W, dora = site.module.base.weight, site.module.dora
    V = W + dora.scaling * dora.lora_B @ dora.lora_A  # (out, in)
    c = dora.magnitude / V.pow(2).sum(1).sqrt()  # (out,)
    return site.x @ (c[:, None] * V - W).T  # (..., out)


def triplets(site: Site) -> torch.Tensor:
    """Return α / r · ((x Aᵀ) ⊙ e) Bᵀ (AdaLoRA: Q, λ and P are A, e and B here)."""
    ada = site.module.ada
    low = (site.x @ ada.lora_A.T) * ada.lora_E.T  # (..., r)
    return ada.alpha / ada.divisor * (low @ ada.lora_B.T)  # (..., out)


def gated_difference(site: Site) -> torch.Tensor:
    """Return x (z ⊙ w)ᵀ, with z the mask or the gates, the matrix's own included (diff pruning)."""
    layer = site.module
    z = torch.ones_like(layer.w) if layer.mask is None else layer.mask  # (out, in)
    for log_alpha in (layer.log_alpha, layer.log_alpha_all):
        if log_alpha is not None:
            z = z * (layer.stretch * torch.tanh(log_alpha / 2)).clamp(0, 1)
    return site.x @ (z * layer.w).T  # (..., out)


def scattered(site: Site) -> torch.Tensor:
    """Return x Sᵀ, with S zero but for the entries that train (sparse tuning)."""
    rows, columns = site.module.indices.long()  # (k,) each
    S = torch.zeros_like(site.module.base.weight)  # (out, in)
    S[rows, columns] = site.module.values
    return site.x @ S.T  # (..., out)


SCHEDULE = dict(tinit=1, tfinal=1, delta=1, total_steps=10)
ON_LINEAR = dict(insertion="parallel", modified=LINEAR, composition=SUM)
DESIGNS[QLoRA] = replace(
    DESIGNS[LoRA], form="x Aᵀ Bᵀ, where h has W in 4 bits", example=QLoRA(rank=8, alpha=16)
)
DESIGNS[DoRA] = Design(
    form="x (c ⊙ (W + s · BA) − W)ᵀ",
    **ON_LINEAR,
    delta=weight_decomposed,
    example=DoRA(rank=8, alpha=16),
)
DESIGNS[AdaLoRA] = Design(
    form="((x Aᵀ) ⊙ e) Bᵀ",
    **SCALED,
    delta=triplets,
    example=AdaLoRA(initial_rank=12, target_rank=8, alpha=16, targets="all-linear", **SCHEDULE),
)
DESIGNS[DiffPruning] = Design(
    form="x (z ⊙ w)ᵀ",
    **ON_LINEAR,
    delta=gated_difference,
    example=DiffPruning(structured=True, targets=("query", "value")),
)
DESIGNS[SparseTuning] = Design(
    form="x Sᵀ", **ON_LINEAR, delta=scattered, example=SparseTuning(rank=8)
)


def rescaled_output(site: Site) -> torch.Tensor:
    """Return h ⊙ (l − 1), for keys and values of (IA)³."""
    return site.h * (site.module.l.flatten() - 1)  # (..., out)


def rescaled_input(site: Site) -> torch.Tensor:
    """Return (x ⊙ (l − 1)) Wᵀ, for the feed-forward of (IA)³."""
    return (site.x * (site.module.l.flatten() - 1)) @ site.module.base.weight.T  # (..., out)


INNER = r".*\d\.output\.dense"  # in a BERT the last linear map of the feed-forward
ON_BERT = dict(composition=SUM, example=IA3(rf".*self\.(key|value)|{INNER}", feedforward=INNER))
DESIGNS[IA3] = (
    Design(
        form="h ⊙ (l − 1)",
        insertion="sequential",
        modified="keys and values",
        **ON_BERT,
        delta=rescaled_output,
        sites=only(linears, lambda m: not m.feedforward),
    ),
    Design(
        form="(x ⊙ (l − 1)) Wᵀ",
        insertion="parallel",
        modified="feed-forward output",
        **ON_BERT,
        delta=rescaled_input,
        sites=only(linears, lambda m: m.feedforward),
    ),
)


def bottleneck(reads: Callable[[Site], torch.Tensor]) -> Callable[[Site], torch.Tensor]:
    """Return the adapter's formula s · (f(t W_downᵀ + b_down) W_upᵀ + b_up), t = reads(site)."""

    def delta(site):
        place, a = site.module, site.module.adapter
        low = a.activation(reads(site) @ a.down.weight.T + a.down.bias)  # (..., m)
        return place.scale * (low @ a.up.weight.T + a.up.bias)  # (..., d)

    return delta


def normed_sum(site: Site) -> torch.Tensor:
    """Return LN(h + x) (..., d), written out."""
    norm = site.module.base.LayerNorm
    return standardised(site.h + site.x, norm.eps) * norm.weight + norm.bias  # (..., d)


def adapter_design(
    kind: str,
    reads: Callable[[Site], torch.Tensor],
    t: str,
    insertion: str,
    modified: str = "feed-forward output",
) -> Design:
    """Return the `Design` of a kind of adapter that reads `t`."""
    return Design(
        form=f"f({t} W_downᵀ + b) W_upᵀ + b′",
        insertion=insertion,
        modified=modified,
        composition="h + s · u",
        delta=bottleneck(reads),
        sites=only(ends, lambda place: place.kind == kind),
        example=BottleneckAdapter(16, kind, scale=2.0),
    )


DESIGNS[BottleneckAdapter] = (
    adapter_design(
        "houlsby", lambda site: site.h, "h", "sequential", "attention and feed-forward output"
    ),
    adapter_design("pfeiffer", normed_sum, "LN(h + x)", "sequential"),
    adapter_design("parallel", lambda site: site.x, "x", "parallel"),
)
DESIGNS[Prefix] = Design(
    form="softmax(x W_qᵀ P_kᵀ / √d_h) P_v",
    insertion="parallel",
    modified="attention heads",
    composition="(1 − λ) h + λ u",
    delta=gated,
    sites=attention,
    example=Prefix(8),
)
DESIGNS[Prompt] = replace(
    DESIGNS[Prefix], form="softmax(x W_qᵀ (H W_kᵀ)ᵀ / √d_h) H W_vᵀ", example=Prompt(8)
)
DESIGNS[MixAndMatch] = tuple(
    replace(design, example=MixAndMatch(8, 16))
    for design in (DESIGNS[Prefix], DESIGNS[BottleneckAdapter][2])
)


def own_change(site: Site) -> torch.Tensor:
    """Return x ΔWᵀ + Δb, for a norm x̂ ⊙ Δg + Δb."""
    W, b = (site.more.get(name, 0) for name in ("Δweight", "Δbias"))
    if isinstance(W, int):
        return b  # (out,)
    return (site.x * W if W.dim() == 1 else site.x @ W.T) + b  # (..., out)


OWN = dict(composition=SUM, sites=own_layers)
DESIGNS[BitFit] = Design(
    form="Δb",
    insertion="reads nothing",
    modified="output of every layer that has a bias",
    delta=lambda site: site.more["Δbias"],
    example=BitFit(),
    **OWN,
)
DESIGNS[PartialFineTuning] = Design(
    form="x ΔWᵀ + Δb; in a norm x̂ ⊙ Δg + Δb",
    insertion="parallel",
    modified="output of every layer chosen",
    delta=own_change,
    example=PartialFineTuning(last=1),
    **OWN,
)
