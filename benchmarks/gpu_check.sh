#!/usr/bin/env bash
# Everything that needs a GPU: correctness first, then benchmarks, then a report of both.
#
#   benchmarks/gpu_check.sh [--quick] [--stages "NAME NAME ..."] [--device cpu] [OUT_FOLDER]
#
# OUT_FOLDER (default: benchmarks/results/gpu) gets gpu_check.json and gpu_check.md, and of every
# stage its log, its result and its exit status. A stage that fails does not stop the others; the
# script fails if one of the correctness stages did. With --stages only some are run, and the report
# has what is in the folder of the others. --quick: smaller grids, a few minutes. --device cpu: a
# dry run of what can be run without a GPU, in Triton's interpreter; its numbers mean nothing.
#
# PYTHON is the interpreter (default: python3); STAGE_SECONDS the limit of each stage (default 580),
# which engines know of: they begin nothing new shortly before it, and write what they have.
set -euo pipefail
given=("$@")
export GPU_CHECK_FROM=${GPU_CHECK_FROM:-$PWD} # what the user's relative paths start from
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if [[ $python == */* && $python != /* ]]; then python=$GPU_CHECK_FROM/$python; fi
export STAGE_SECONDS=${STAGE_SECONDS:-580}
all="environment kernels tokens graphs small_memcheck small_racecheck bandwidth attention"
all="$all engine_dense engine_sparse-long engine_sparse"
stages=$all
output=$PWD/benchmarks/results/gpu
device=cuda
quick=()
skipped=77 # as in benchmarks/gpu/command.py

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' benchmarks/gpu_check.sh
    echo "Stages: $all"
}

while (($#)); do
    case $1 in
    --quick) quick=(--quick) ;;
    --stages)
        stages=${2:?--stages needs names}
        shift
        ;;
    --device)
        device=${2:?--device needs cuda or cpu}
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    -*)
        echo "unknown option: $1" >&2
        usage >&2
        exit 2
        ;;
    /*) output=$1 ;;
    *) output=$GPU_CHECK_FROM/$1 ;;
    esac
    shift
done
for name in $stages; do
    if [[ " $all " != *" $name "* ]]; then
        echo "unknown stage: $name; there are: $all" >&2
        exit 2
    fi
done

mkdir -p "$output"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
arguments=(--output "$output" --device "$device" ${quick[@]+"${quick[@]}"})

sanitizer() {
    command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null
}

# What a stage does; its exit status is the stage's.
run_stage() {
    local tool
    if [[ $device == cpu && $1 =~ ^(small_|bandwidth|attention) ]]; then
        export TRITON_INTERPRET=1
    fi
    case $1 in
    environment) "$python" -m benchmarks.gpu.environment "${arguments[@]}" ;;
    kernels) "$python" -m benchmarks.gpu.kernel_tests "${arguments[@]}" ;;
    tokens) "$python" -m benchmarks.gpu.engine_tokens "${arguments[@]}" ;;
    graphs) "$python" -m benchmarks.gpu.graph_against_eager "${arguments[@]}" ;;
    small_*)
        if [[ $device == cpu ]]; then
            tool=
        elif ! tool=$(sanitizer); then
            echo "skipped: compute-sanitizer is not installed"
            return $skipped
        fi
        # Without torch's own pools, so that memory behind a tensor is not another one's. Compiled
        # first: what compiles is not watched, and takes longer where it is.
        "$python" -m benchmarks.gpu.small_cases plain "${arguments[@]}"
        if [[ ! $tool ]]; then return; fi
        # The interpreter may be started by a script, or busy for a while before it needs the GPU.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "${1#small_}" --report-api-errors no \
            --target-processes all --launch-timeout 120 --error-exitcode 86 \
            "$python" -m benchmarks.gpu.small_cases "${1#small_}" "${arguments[@]}"
        ;;
    bandwidth) "$python" -m benchmarks.gpu.kernel_bandwidth "${arguments[@]}" ;;
    attention) "$python" -m benchmarks.gpu.attention_step "${arguments[@]}" ;;
    engine_*) "$python" -m benchmarks.gpu.engine_throughput "${1#engine_}" "${arguments[@]}" ;;
    esac
}

# Started by the loop below, so that a limit ends all that the stage has started.
if [[ ${GPU_CHECK_STAGE:-} ]]; then
    run_stage "$GPU_CHECK_STAGE"
    exit
fi
for name in $stages; do
    echo "== $name ($(date +%T))"
    begun=$SECONDS
    status=0
    # What an earlier run has left would look like this one's.
    rm -f "$output/$name.json"
    GPU_CHECK_STAGE=$name timeout --kill-after=20 "$STAGE_SECONDS" \
        bash benchmarks/gpu_check.sh ${given[@]+"${given[@]}"} 2>&1 | tee "$output/$name.log" || status=$?
    echo "$status $((SECONDS - begun))" >"$output/$name.status"
    echo "== $name: exit status $status after $((SECONDS - begun)) s"
done
"$python" -m benchmarks.gpu.report --output "$output"
