"""What the exact quantum layer costs, everything side by side in one run. Not a test.

    python tests/benchmark_quantum_attention.py                 # tables 1 to 4, about four minutes
    python tests/benchmark_quantum_attention.py --default_run   # table 5 as well, ten minutes more

Batch 64, 16 qubits, 3 layers unless said; medians over interleaved repeats.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import quantum_diffusion_mnist as mnist

BATCH, QUBITS, LAYERS = 64, 16, 3


def medians(functions: dict, repeats: int) -> dict:
    """Median seconds of each function; they take turns, after one call to warm up."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def training_step(arm: str):
    """One training step as in the script's loop, drawing the batch included."""
    torch.manual_seed(0)
    model, diffusion = mnist.UNet(1, arm), mnist.GaussianDiffusion(1000)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, ema = torch.optim.Adam(trainable, fused=True), mnist.EMA(model, 0.995)
    images = torch.randint(256, (6131, 1, 28, 28), dtype=torch.uint8)
    fields = dict.fromkeys(mnist.Settings.__annotations__)
    settings = mnist.Settings(**fields | {"seed": 0, "batch_size": BATCH})

    def step():
        x0, t, noise = mnist.training_batch(settings, images, 0, 1000)
        output = model(diffusion.q_sample(x0, t, noise), t)
        errors = (output - diffusion.target(x0, t, noise)).square().mean((1, 2, 3))
        loss = (diffusion.noise[t] * errors).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)

    return step


def sampling_step(arm: str, batch: int):
    """One denoising step."""
    torch.manual_seed(0)
    model, diffusion = mnist.UNet(1, arm), mnist.GaussianDiffusion(1000)
    x = torch.randn(batch, 1, 28, 28)

    @torch.no_grad()
    def step():
        diffusion.p_sample(model, x, 500, x)

    return step


def layer(simulator: str, qubits: int = QUBITS, layers: int = LAYERS):
    """Forward and backward of the circuit alone."""
    torch.manual_seed(0)
    gate = mnist.QuantumAttention(128, qubits, layers, simulator=simulator)
    angles = torch.randn(BATCH, qubits, requires_grad=True)
    return lambda: gate.expectations(angles).square().sum().backward()


def peak(queue, simulator: str, calls: int):
    """In a process of its own: seconds of the best call and megabytes it added to the peak."""
    call = layer(simulator)
    layer(simulator, 2, 1)()  # imports and thread pools are not the layer's memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((statistics.median(seconds), (after - before) / 1024))


def default_run(data_dir: str) -> None:
    """Table 5: the wall-clock of ``--use_quantum`` with default flags, by its parts."""
    spent = {"train": 0.0, "preview": 0.0, "final grid": 0.0}

    def timed(name, function):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        return wrapper

    original, inside = (
        mnist.GaussianDiffusion.sample,
        timed("preview", mnist.GaussianDiffusion.sample),
    )
    mnist.train = timed("train", mnist.train)
    mnist.sample_final = timed("final grid", mnist.sample_final)
    mnist.GaussianDiffusion.sample = lambda self, *args: (
        inside(self, *args) if len(args) == 4 else original(self, *args)  # the bar is the fifth
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        mnist.main(["--use_quantum", "--data_dir", data_dir, "--save_dir", folder])
    spent["whole run"] = time.perf_counter() - start
    spent["train"] -= spent["preview"]
    print("\n5. default run, seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in spent.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--default_run", action="store_true", help="time a whole run as well")
    parser.add_argument("--data_dir", default="data", help="for --default_run (default: data)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")

    arms = ("classical", "quantum", "matched")
    times = medians({arm: training_step(arm) for arm in arms}, 60)
    print("\n1. training step            ms   / classical")
    for arm, seconds in times.items():
        print(f"   {arm:20} {1e3 * seconds:8.1f}   {seconds / times['classical']:.3f}")

    print("\n2. layer, forward + backward  seconds   / exact   peak MiB")
    context = multiprocessing.get_context("spawn")
    exact = None
    for simulator, calls in (("exact", 50), ("lightning.qubit", 2), ("default.qubit", 1)):
        queue = context.Queue()
        process = context.Process(target=peak, args=(queue, simulator, calls))
        process.start()
        seconds, megabytes = queue.get()
        process.join()
        exact = exact or seconds
        print(
            f"   {simulator:20} {seconds:15.4f} {seconds / exact:9.0f} {megabytes:10.0f}",
            flush=True,
        )

    print("\n3. exact layer, forward + backward   ms")
    sizes = [(n, LAYERS) for n in (16, 32, 64, 128)] + [(QUBITS, n) for n in (1, 2, 3, 4)]
    for (n, depth), seconds in medians({s: layer("exact", *s) for s in sizes}, 20).items():
        print(f"   {n:3} qubits, {depth} layers {1e3 * seconds:16.2f}")

    print("\n4. sampling step              ms   / classical")
    for batch in (64, 5):
        steps = {arm: sampling_step(arm, batch) for arm in ("classical", "quantum")}
        times = medians(steps, 60)
        for arm, seconds in times.items():
            ratio = seconds / times["classical"]
            print(f"   batch {batch:2} {arm:12} {1e3 * seconds:8.2f}   {ratio:.3f}")
    if args.default_run:
        default_run(args.data_dir)


if __name__ == "__main__":
    main()
