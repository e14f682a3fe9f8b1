# The models of family.sh and recall.sh: name, width on text, width on needles, options. Nearly equal numbers of parameters.
# window is attention without a memory, lmm-m is lmm with momentum.
MODELS=(
  "gpt     152 104 --arch=gpt"
  "window  152 104 --arch=mag --memory_layers=none"
  "mac     128  96 --arch=mac"
  "mag     128  96 --arch=mag"
  "mal     128  96 --arch=mal"
  "lmm     148 108 --arch=lmm"
  "lmm-m   148 108 --arch=lmm --memory_momentum=0.5 --memory_lr=0.6"
)
