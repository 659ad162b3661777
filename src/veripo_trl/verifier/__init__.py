"""Judging rollouts: does the thinking conclude the answer that is given?"""
