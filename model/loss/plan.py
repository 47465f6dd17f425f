"""Which of the exact algorithms is the cheapest, by arithmetic alone."""


def choose_algorithm(global_batch: int, width: int) -> str:
    """ "gram" where two N x N products cost less than one D x D product and its gradients, else "dense".

    Forward and backward take 6 N D^2 flop for dense and 8 N^2 D for gram, so they break even at N = 0.75 D.
    """
    return "gram" if global_batch < 0.75 * width else "dense"
