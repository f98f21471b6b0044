"""Applications of `bilevel`: they use its public interface only."""
