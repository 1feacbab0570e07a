// Examples and the results that PyTorch gave for them, as stored integers.
#pragma once

static const long long recorded_inputs[2][5] = {
    {
    -13, -11, -16, 3, 34},
    {
    -18, -33, -14, -9, -13},
};

static const long long recorded_outputs[2][5] = {
    {
    0, 0, 0, 1, 8},
    {
    0, 0, 0, 0, 0},
};
