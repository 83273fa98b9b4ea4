"""Changing clothes with proof: conversion, and the comparison of any two checkpoints."""
