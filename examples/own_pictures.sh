#!/usr/bin/env bash
# From Kosmos-2, a Stable Diffusion and a folder of pictures to a model that draws what they show:
# import, data, latents, align, instruct, export, pictures. docs/recipes.md tells each step.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash examples/own_pictures.sh --pictures DIR --kosmos2 DIR
                                     --stable-diffusion DIR [OPTION ...]
                                     [-- SETTING=VALUE ...]

  --pictures DIR         photos, a folder for each subject ("my dog/1.jpg"), or named by it
  --kosmos2 DIR          microsoft/kosmos-2-patch14-224
  --stable-diffusion DIR (or --sd) a Stable Diffusion 1.x in diffusers' layout
  --output DIR           for everything that is made (own_pictures)
  --masks DIR            a CLIPSeg that cuts the subjects out (none: whole pictures)
  --captions PREFIX      captions to align on, as `kosmosg preprocess` left them (the pictures' own)
  --gpus N               of this machine (1)
  --align-config NAME    a shipped config or a file (align_1gpu)
  --instruct-config NAME (instruct_1gpu)
  --image-size N         pixels that are drawn (512)
  SETTING=VALUE          for both trainings, such as what the configs say to add for your card

Ctrl-C is safe: the same command continues where it was. A step whose output exists is skipped;
delete the output to repeat it. Uses the Python that has this package, or makes .venv.
Exit codes: those of the command that failed; 2 wrong arguments.
END
}

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"

wrong() {
    echo "error: $*; --help says what can be given" >&2
    exit 2
}

pictures='' kosmos2='' sd='' out=own_pictures masks='' captions='' gpus=1 size=512
align=align_1gpu instruct=instruct_1gpu settings=()
while [ $# -gt 0 ]; do
    case $1 in
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
        --sd) set -- --stable-diffusion "${@:2}" && continue ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            settings=("$@")
            break
            ;;
        --pictures | --kosmos2 | --stable-diffusion | --output | --masks | --captions | --gpus | \
            --align-config | --instruct-config | --image-size)
            if [ $# -lt 2 ] || [ -z "$2" ]; then
                wrong "$1 needs a value"
            fi
            case $1 in
                --pictures) pictures=$2 ;;
                --kosmos2) kosmos2=$2 ;;
                --stable-diffusion) sd=$2 ;;
                --output) out=$2 ;;
                --masks) masks=$2 ;;
                --captions) captions=$2 ;;
                --gpus) gpus=$2 ;;
                --align-config) align=$2 ;;
                --instruct-config) instruct=$2 ;;
                --image-size) size=$2 ;;
            esac
            shift
            ;;
        *) wrong "unknown option: $1" ;;
    esac
    shift
done
for given in "--pictures:$pictures" "--kosmos2:$kosmos2" "--stable-diffusion:$sd"; do
    [ -n "${given#*:}" ] || wrong "${given%%:*} is missing"
    [ -d "${given#*:}" ] || [ "${given%%:*}" = --stable-diffusion ] ||
        wrong "${given%%:*} ${given#*:}: no such folder"
done
for part in unet vae; do # an export takes no other files
    compgen -G "$sd/$part/*.safetensors" >/dev/null ||
        wrong "--stable-diffusion $sd: $part has no safetensors files; docs/recipes.md says how to make them"
done
[[ $gpus =~ ^[1-9][0-9]*$ ]] || wrong "--gpus $gpus is no number of GPUs"

if python -m megatron_kosmosg --help >/dev/null 2>&1; then
    PYTHON=python
else
    prepare_environment test,data
fi
export PYTHONPATH=$REPOSITORY:$REPOSITORY/examples${PYTHONPATH:+:$PYTHONPATH}

# step WHAT OUTPUT COMMAND...: says it, and runs it unless OUTPUT ("" for none) exists.
step() {
    local what=$1 output=$2
    shift 2
    if [ -n "$output" ] && [ -e "$output" ]; then
        echo "== $what: $output is there"
        return
    fi
    echo "== $what"
    local line=${*/#$PYTHON/python}
    echo "$ ${line/#train/kosmosg train}"
    "$@"
}
kosmosg() { "$PYTHON" -m megatron_kosmosg "$@"; }
train() {
    if [ "$gpus" = 1 ]; then kosmosg train "$@"; else kosmosg launch --ranks "$gpus" train "$@"; fi
}

mkdir -p "$out" 2>/dev/null || wrong "cannot make the folder $out; choose another with --output"
tokenizer=$kosmos2/sentencepiece.bpe.model
step "Kosmos-2 as a checkpoint" "$out/kosmos2" \
    kosmosg convert import-kosmos2 --input "$kosmos2" --output "$out/kosmos2"
step "What the pictures show" "" \
    "$PYTHON" -m own_pictures --pictures "$pictures" --output "$out/described"
step "Records of subjects" "$out/built/report.txt" \
    kosmosg build-data --input "$pictures" --output "$out/built" \
    --captions "$out/described/annotations.jsonl" --entities "$out/described/annotations.jsonl" \
    --masks "${masks:-$out/described/annotations.jsonl}" --image-size "$size"
step "A dataset of subjects" "$out/data/subjects.json" \
    kosmosg preprocess --kind compositional --input "$out/built/records/*.tar" --resume \
    --tokenizer-model "$tokenizer" --output-prefix "$out/data/subjects"
step "A dataset of captions" "$out/data/captions.json" \
    kosmosg preprocess --kind caption --input "$out/described/captions.jsonl" --resume \
    --image-root "$pictures" --tokenizer-model "$tokenizer" --output-prefix "$out/data/captions"
step "VAE moments of the pictures" "" \
    kosmosg cache-latents "$out/data/subjects" "$out/data/captions" --stable-diffusion "$sd" \
    --image-size "$size"
aligned_on=${captions:-$out/data/captions}
step "Align" "" train --config "$align" "data.tokenizer_model=$tokenizer" \
    "model.clip_text.path=$sd" "checkpoint.load=$out/kosmos2" "logging.output_dir=$out/align" \
    "data.blend.caption.path=$aligned_on" "data.heldout.caption.path=$aligned_on" \
    ${settings[@]+"${settings[@]}"}
step "Instruct" "" train --config "$instruct" "data.tokenizer_model=$tokenizer" \
    "model.diffusion.path=$sd" "checkpoint.load=$out/align" "logging.output_dir=$out/instruct" \
    "data.blend.compositional.path=$out/data/subjects" "data.blend.edit=null" \
    "data.blend.caption.path=$out/data/captions" "data.heldout.edit=null" \
    "data.heldout.compositional.path=$out/data/subjects" "data.heldout.caption=null" \
    "data.target_image_size=$size" ${settings[@]+"${settings[@]}"}
step "A folder for diffusers" "$out/exported" \
    kosmosg convert export-hf --input "$out/instruct" --stable-diffusion "$sd" \
    --output "$out/exported"
step "Pictures" "" kosmosg generate --model "$out/exported" --image-root "$pictures" \
    --prompts "$out/described/prompts.jsonl" --output "$out/drawn"
echo "The pictures are in $out/drawn, the model is $out/exported"
