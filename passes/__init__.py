"""The compiler passes: capture -> blocks -> dependencies -> reuse -> rectify -> plan -> specialise, a file and a function each.

For what is compiled: ``narrow`` (linear layers of which a part is needed), ``regions`` (pieces that all graphs share),
``merge`` (fewer graphs), ``buffers`` (where a cache lies) and ``sizes`` (any batch). For what is captured: ``state`` (what a
denoiser keeps from call to call). Beside them ``knowledge`` (rules that change results a little) and ``relax`` (scores in the
place of decisions), for learning, and ``attention`` (what attention attends to), for schedules.

They know graphs, not models: nothing here imports diffusers or asks for the class of a denoiser. ``maskcompile`` is the
package to use; this one is what it is made of.
"""

#: Lets ``import maskcompile`` tell these passes from a module of the same name in the user's own folder.
OWNER = "maskcompile"
