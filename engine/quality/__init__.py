"""Measures by which a rendered video is judged, whatever model or world it came from.

| module | says |
|---|---|
| `bands` | how faithful the low frequencies are to the proxy, how much lies above them |
| `seams` | whether windows show at their borders (`lines` knows where those are) |
| `repetition` | whether things or windows occur twice |
| `flow` | whether texture follows the motion, and whether brightness flickers |
| `motion` | how fast something moves |
| `colour` | whether a window's colour strays from the proxy's |
| `optical_flow` | how a video moves of which nobody knows it |
| `report` | all of it over time, for the artist: `verdict` in words, `report_picture` drawn |
| `statistics` | means and paired differences with confidence intervals |

A video is [T, H, W, 3], float, 0 to 1 (ComfyUI's IMAGE). Where a function takes `Frames`, any
iterable of frames [H, W, 3] will do, so a 4K clip can be read one frame at a time. A function
returns one number per frame, pair of frames, line or window where that makes sense; the reduction
to one number is a function of its own. Differences of brightness are in grey levels, 1/255.
"""
