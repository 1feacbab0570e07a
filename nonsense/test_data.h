// Examples and the results that PyTorch gave for them, as stored integers.
#pragma once

static const long long recorded_inputs[2][5] = {
    {
    -4, 17, -22, -25, 7},
    {
    0, -8, 6, 3, -10},
};

static const long long recorded_outputs[2][5] = {
    {
    0, 4, 0, 0, 2},
    {
    0, 0, 2, 1, 0},
};
